"""The HTTP server: the OpenAI API over an engine, and the page to chat on."""
