"""Column orders in which the N:M pattern costs less."""
