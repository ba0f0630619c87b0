"""Clients of servers that hold pages, models or files: made here for the storage backends and for the connectors."""
