"""The rooms that know gradio and the WebUI's `modules`: the panel, the infotext, the settings, the axes and the API."""
