"""Weight files through an mmap: headers without torch, tensors with it."""
