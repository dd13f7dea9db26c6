"""How the models and data sets of the course were made, each with one command."""
