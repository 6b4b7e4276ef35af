"""Systems that explain a model by its attention."""
