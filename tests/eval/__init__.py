"""Tests of few-shot evaluation."""
