"""Memories as scikit-learn's estimators. They are written in `hamux.memories.estimators`."""

from ..memories.estimators import (
    MemoryClassifier, MemoryClusterer, MemoryDetector, MemoryImputer, MemoryRegressor,
)

__all__ = [
    "MemoryImputer", "MemoryClassifier", "MemoryRegressor", "MemoryDetector", "MemoryClusterer",
]
