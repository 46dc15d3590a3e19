"""rayexp: distributed training experiments on Ray, with the same bits at any number of workers."""

__version__ = "0.1.0"
