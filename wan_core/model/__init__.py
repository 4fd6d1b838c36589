"""The WAN 2.1 transformer on megatron-core's parallel layers."""
