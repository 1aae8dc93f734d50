"""Deep-learning systems in JAX and Flax Linen. Import what you need: `jaxdl.nn`, `jaxdl.models`, `jaxdl.losses`, `jaxdl.data`, `jaxdl.training`, `jaxdl.pretrained`."""
