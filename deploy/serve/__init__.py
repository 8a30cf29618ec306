"""`bouquet serve`: adapters behind an OpenAI-compatible address, by vLLM or by PEFT."""
