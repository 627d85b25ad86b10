"""Parts of the report of a synthetic set: what is read, drawn, put into words and shown by its viewer."""
