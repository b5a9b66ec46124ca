"""Language models, asked for structured answers: what every method here asks them with."""
