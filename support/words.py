"""The words of a run: what its arms, columns and counts are called in tables, charts and text."""

# arm in results.csv -> its name in tables, charts and sentences
ARMS = dict(dense="dense", ticket="ticket", reinit="reinit", random="random mask",
            finetune="fine-tuned", small="small dense", oneshot="one-shot ticket",
            transform="transformed, not pruned", probe="other data order")
# arm -> what it is, and what it asks
ASKS = dict(
    dense="The whole network, trained from its first weights. Every other arm is held against it.",
    ticket="The sparse network: the smallest trained weights are pruned, the rest go back to an "
           "early training step and are trained again. Does it draw as well as dense?",
    reinit="The mask of the ticket on new initial weights, trained for all steps. Do the early "
           "weights matter, or is the shape of the mask enough?",
    random="As many live weights in every layer, in places drawn at random, on the early weights "
           "of the ticket. Does it matter which weights were kept?",
    finetune="The mask of the ticket on the trained weights, which are trained on at a low rate. "
             "Does going back matter?",
    small="A narrower dense network with about as many weights as the ticket has left. Does "
          "sparsity matter, or would fewer channels do as well?",
    oneshot="As many weights pruned from the dense network in a single cut, the rest taken back to "
            "the same early step. Do the rounds matter?",
    transform="The network in which the weights outside a random mask were shrunk, before they "
              "are cut. It shows what the transformation alone costs.",
    probe="The dense network, trained again from the early step on with its data in another "
          "order. How alike the two are, block by block, sets the rates of the layers.")
# column of results.csv -> its name in the table at the end
QUALITY = dict(fid_domain="fid_domain", precision_domain="prec.", recall_domain="recall",
               classes_domain="classes", mean_pixel="pixel", fid="fid", kid="kid",
               inception_score="IS", precision="prec. (I)", recall="recall (I)")
# name in the table -> what it says; several seeds show mean ± standard deviation
LEGEND = {
    "round": "number of prune-and-retrain rounds; 0: the dense network",
    "arm": "which network",
    "pruned": "share of the prunable weights (convolutions, linear layers) that are exactly 0",
    "live weights": "prunable weights that are left",
    "seeds": "training runs behind the line; with several, mean ± standard deviation",
    "fid_domain": "Frechet distance from the training images, features of a classifier of this "
                  "data set; lower is better",
    "prec.": "share of samples that lie near a real image, same features; higher is better",
    "recall": "share of real images that lie near a sample, same features; higher is better",
    "classes": "share of samples that would have to change class to meet the data's shares",
    "pixel": "mean brightness, 0 to 255; should be close to that of real images",
    "fid": "Frechet distance in Inception's features; lower is better",
    "kid": "squared kernel distance (MMD) in Inception's features; lower is better",
    "IS": "Inception score; higher is better",
    "prec. (I)": "as prec., in Inception's features",
    "recall (I)": "as recall, in Inception's features",
    "val_loss": "squared error of the predicted noise on held-out images; lower is better",
    "live MMACs": "million multiply-accumulates of one evaluation that touch a live weight",
    "ticket kB": "size of the .ticket file: one bit a weight, and the live values",
    "train s": "seconds of this training alone",
    "s/1000": "seconds per 1,000 samples",
}


def counted(n, word):
    """1 seed, 3 seeds, 2,000 samples."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def seeds_of(seeds):
    """seed 0; seeds 0, 1, 2."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def clock(seconds):
    """45 s, 3 min, 1 h 05 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def legend(header):
    """A line per column: [(name, what it says)]."""
    return [(name, LEGEND[name]) for name in header]
