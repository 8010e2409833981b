"""Typed client of the portal: `client` asks, `schemas` has what it takes and gives."""
