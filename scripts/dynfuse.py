"""The extension's script: what the WebUI calls, and when. The work is done in lib_dynfuse."""

from __future__ import annotations

from modules import script_callbacks, scripts

from lib_dynfuse.session import close_all
from lib_dynfuse.webui import api, generation, panel, settings, xyz


class DynFuse(scripts.Script):
    def title(self):
        return generation.TITLE

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        built = panel.build(is_img2img, self.elem_id)
        self.infotext_fields = built.infotext_fields
        self.paste_field_names = built.paste_field_names
        return built.components

    def setup(self, p, *args):
        close_all()

    def before_process(self, p, *args):
        generation.forget(p)

    def process(self, p, *args):
        generation.begin(p, args)

    def after_extra_networks_activate(self, p, *args, extra_network_data, **kwargs):
        generation.activate(p, extra_network_data)

    def process_before_every_sampling(self, p, *args, **kwargs):
        generation.attach(p)

    def postprocess_batch(self, p, *args, images, **kwargs):
        generation.finish_batch(p, images)

    def postprocess_batch_list(self, p, pp, *args, **kwargs):
        generation.keep_best(p, pp)

    def postprocess(self, p, processed, *args):
        generation.finish(p, processed)


def register_axes():
    xyz.register(scripts.scripts_data)


register_axes()
script_callbacks.on_before_ui(register_axes)
script_callbacks.on_ui_settings(settings.on_ui_settings)
script_callbacks.on_app_started(api.on_app_started)
script_callbacks.on_cfg_denoiser(generation.step)
script_callbacks.on_cfg_denoised(generation.predicted)
script_callbacks.on_cfg_after_cfg(generation.after_cfg)
script_callbacks.on_script_unloaded(close_all)
