"""Systems that change how a score is made or how scores become weights."""
