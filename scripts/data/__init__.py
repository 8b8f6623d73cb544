"""`orion data`: token shards from parquet, JSONL or text, and what a folder of them holds."""
