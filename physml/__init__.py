"""physml: neural surrogates for PDEs and climate in JAX."""

__version__ = "0.1.0"
