"""The op records. Importing this package registers them all."""
