"""The chain from a changed file to rows in the database, and the side of it that hosts see."""
