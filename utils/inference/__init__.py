"""A trained model as predictor and exporter."""
