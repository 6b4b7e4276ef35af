"""Systems that are programming models: they hold whole families of mechanisms."""
