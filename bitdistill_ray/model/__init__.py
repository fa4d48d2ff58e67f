"""Models: where they come from, what is changed in them, and what is read out of them."""
