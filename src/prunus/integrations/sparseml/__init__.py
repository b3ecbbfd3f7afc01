"""The names of other libraries, on the engine of this one."""
