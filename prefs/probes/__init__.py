"""From a residual-stream vector to the rating: probes trained with Lightning, cross-validated over tasks."""
