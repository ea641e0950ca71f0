"""Backends: how the calls of a policy are carried out, by hooks around the model's forward or by pure functions."""
