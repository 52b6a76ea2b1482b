"""A zarr store whose objects are kept on disk (`physml.data.remote`)."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import WrapperStore

from physml.data import remote


class KeptStore(WrapperStore[Store]):
    """Reads every object, or part of one, only once from the store below. Absent objects are asked for again."""

    def __init__(self, store: Store, folder: Path, limit: int):
        super().__init__(store)
        self.folder, self.limit = folder, limit

    def _with_store(self, store: Store) -> "KeptStore":
        return KeptStore(store, self.folder, self.limit)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        prototype = prototype or default_buffer_prototype()
        file = self.folder / hashlib.sha256(f"{key} {byte_range!r}".encode()).hexdigest()[:32]
        content = await asyncio.to_thread(remote.recall, file)
        if content is not None:
            return prototype.buffer.from_bytes(content)
        found = await self._store.get(key, prototype, byte_range)
        if found is not None:
            await asyncio.to_thread(remote.keep, file, found.to_bytes(), self.limit)
        return found
