"""Federated runs across real sites, on Flower; needs `fedekd[flower]`.

Threat model
  Never sent by a site: images, rows of tables, labels, groups, sample indices, per-sample results, private models,
    optimizer states, the local baseline's model and exit thresholds.
  Sent to the server: names of the site and of the classes; split sizes, class counts, and SHA-256 digests of the
    samples and of a table's columns and categories; all metrics on the test split (recall per class, too), also those
    of the local baseline, the control and the tuned local model, and means over samples; the counts, p-value and
    decision of do-no-harm; the method's update (FedeKD: the proxy); that a reply failed, without the text of the error
    (in the site's log), which may quote cells, groups and paths.
  Protected against:
    - the network and unregistered sites, by Flower's TLS and SuperNode keys, which the operators must enable;
    - malformed messages: site and server parse JSON and raw arrays, never pickles, and the server rejects updates with
      wrong keys, shapes or dtypes, values out of range, too many bytes, or a change out of proportion to the others';
    - with `secure=true`, an honest-but-curious server: it receives the mean of at least three updates, no single one.
  Not protected against:
    - inference from a model or from the counts and scores. The options `privacy` add noise to updates at the site, with
      an account of epsilon over all rounds; counts and scores have none;
    - a site that sends a well-formed false update or score. `max_update_norm` and robust aggregators limit the effect;
      with `secure=true` only the mean can be checked, so the effect may go unnoticed;
    - with `secure=true`, a malicious server: one that replaces the sites' public keys, repeats a round with one site
      fewer, sends another app (limit it by `flower-supernode --trusted-entities`), or searches the 2^32 seeds from
      which Flower 1.41 draws a mask; nor sites that collude with the server;
    - access to a site's disk or server's run folder: files there are not encrypted.
"""
