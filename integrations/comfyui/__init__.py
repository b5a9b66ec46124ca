from vstar_kernels.integrations.comfyui import comfy_entrypoint as comfy_entrypoint

WEB_DIRECTORY = "./web"
