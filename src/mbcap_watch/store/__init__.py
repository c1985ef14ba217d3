"""The database: which rows a snapshot changes, all SQL, and the connection that runs it."""
