"""PyTorch only: the model, its stages and its numbers. No network, no chain, no asyncio."""
