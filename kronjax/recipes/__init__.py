"""Recipes of the literature, by name, for `kronjax.recipe.load`."""
