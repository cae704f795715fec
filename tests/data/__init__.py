"""Tests of shards, order and loader."""
