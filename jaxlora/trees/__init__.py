"""From a tree to a tree: adapt it, split it, bind it, merge it, quantize it."""
