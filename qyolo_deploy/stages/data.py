"""Stage `data`: generated scenes, or a check of the dataset that the recipe names."""

from qyolo_deploy.data.dataset import check_images, digest_dataset, load_dataset
from qyolo_deploy.data.synthetic import generate
from qyolo_deploy.stages.context import StageContext, StageOutput

SPLITS = ("train", "val")


def run(context: StageContext) -> StageOutput:
    """Generates or checks the data, so that no later stage meets a corrupt image."""
    recipe = context.recipe
    files = []
    if context.source is None:
        settings = recipe.data.synthetic
        with context.reporter.progress("generating scenes") as tick:
            generate(
                context.folder / "data",
                seed=settings.seed,
                train_images=settings.train_images,
                val_images=settings.val_images,
                imgsz=recipe.model.imgsz,
                progress=tick,
            )
        files = [context.dataset, *(context.folder / "data" / "annotations").iterdir()]
    info: dict[str, object] = {}
    for split in SPLITS:
        dataset = load_dataset(context.dataset, split)
        with context.reporter.progress(f"checking {split} images") as tick:
            check_images(dataset, tick)
        info[split] = {"images": len(dataset), "digest": digest_dataset(dataset)}
        info["names"] = list(dataset.class_names)
    return StageOutput("dataset", files, info)
