"""What the verbs of the command line are made of. Nothing numerical is imported before a verb runs."""
