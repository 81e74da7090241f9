"""Structured output: the language a request asks for, compiled by llguidance, as a mask over the next token."""
