"""The endpoints of OpenAI's API: request bodies, content parts, answers and errors in its shapes."""
