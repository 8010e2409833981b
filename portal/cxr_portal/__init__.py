"""The portal: an API for applications and a page for people, in front of a served model."""
