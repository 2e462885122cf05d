"""Files and folders: atomic writes, matrices, tensors, storage, caches, progress."""
