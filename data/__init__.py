"""Documents -> webdataset shards -> lanes. Knows nothing of models, optimizers or process groups."""
