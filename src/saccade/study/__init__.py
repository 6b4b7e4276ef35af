"""The study: systems x tasks x lengths on one model, everything against dense in the same run."""
