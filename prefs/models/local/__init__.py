"""The TransformerLens engine: sampling, option scoring, capture and steering on this machine."""
