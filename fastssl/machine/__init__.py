"""What this machine has, what may be used of it, and how: cores, memory, GPUs, compilers, libraries."""
