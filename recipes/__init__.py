"""Recipes: how the models and data that the course ships were made, each with one command."""
