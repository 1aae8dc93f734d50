"""Attention: `problem` says what is computed, `masks` which pairs are visible; one file per implementation; `api` chooses among them."""
