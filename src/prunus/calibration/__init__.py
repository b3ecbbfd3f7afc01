"""Statistics collected on data: passes over it, their memory, and what is made of them."""
