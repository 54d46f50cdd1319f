"""How weights are made and judged: simulation, training, evaluation. The app imports nothing from here."""
