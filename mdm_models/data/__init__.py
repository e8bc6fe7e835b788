"""Shards of captioned pictures and clips → uint8 tensors; knows no model, loss or command line."""
