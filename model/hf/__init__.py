"""The model as `transformers` knows it: source files that `model.export` copies into an exported folder as they are."""
