"""From documents in files to the token shards that a manifest names."""
