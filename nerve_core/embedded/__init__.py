"""The model pair that comes with the package: its settings, its weights and the drawn scenes they learnt from."""
